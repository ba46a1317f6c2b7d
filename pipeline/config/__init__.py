"""Configuration: compose the files of conf/ and key=value overrides into a frozen `Config`."""
