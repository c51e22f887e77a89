"""Rollouts: what runs where, in which order, under whose approval; and the desired state that follows."""
