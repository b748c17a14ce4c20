"""An engine that replaces the one inside when that fails."""
