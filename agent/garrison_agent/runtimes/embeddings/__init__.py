"""The engine and the API of embedding models."""
