"""Boot, reload, drain; owns every long-lived object."""
