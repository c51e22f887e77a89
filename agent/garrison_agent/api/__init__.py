"""The local API: OpenAI, Open Inference Protocol, and model management on loopback and a unix socket."""
