"""The agent's decisions, all pure: no clock, no I/O, no threads."""
