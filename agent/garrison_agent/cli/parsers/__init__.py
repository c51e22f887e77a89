"""What each group of commands accepts: one file per group, each with an ``add_to`` that registers it."""
