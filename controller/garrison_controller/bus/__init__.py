"""The controller at the broker: what boards send is verified, committed, and only then acknowledged."""
