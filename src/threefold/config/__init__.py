"""The typed recipe and how it is read: TOML file, dotted overrides, one line per mistake."""
