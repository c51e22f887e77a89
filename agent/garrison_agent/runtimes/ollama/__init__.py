"""Ollama's API over a text engine."""
