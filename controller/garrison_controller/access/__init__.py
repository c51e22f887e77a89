"""Who may do what: principals, tokens, grants, and the record of administrative actions."""
