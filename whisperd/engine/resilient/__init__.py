"""An engine that survives the death of the one inside."""
