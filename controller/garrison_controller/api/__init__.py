"""REST API of the controller."""
