"""Configuration: files of conf/ and key=value overrides, composed once into a frozen `Config`."""
