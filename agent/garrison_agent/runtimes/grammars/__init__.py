"""From JSON schemas to grammars that hold a model to them. Pure."""
