"""What agent and controller both speak: topics, envelopes, messages, the model manifest, states, errors."""

PROTOCOL_VERSION = "1.0"
