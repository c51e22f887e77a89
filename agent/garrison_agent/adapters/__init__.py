"""Adapters to the world outside: disk, broker, controller, sensors, systemd. Constructed only in ``wiring``."""
