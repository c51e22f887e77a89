"""What boards measured, read from their telemetry rows."""
