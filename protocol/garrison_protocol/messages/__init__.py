"""Bodies of envelopes, one module per subject. Fields are only ever added; unknown ones are ignored."""
