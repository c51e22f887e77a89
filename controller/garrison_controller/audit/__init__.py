"""Boards' numbered rows as the controller keeps them, alarms about them, and their verification."""
