"""The command line ``garrison-agent``: standard library only, so that it starts fast on a small board."""
