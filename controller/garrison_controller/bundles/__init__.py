"""Bundles: the registry and boards' messages on a stick, out to boards without a network and home again."""
