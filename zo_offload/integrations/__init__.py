"""Where other libraries meet the engine."""
