"""The port through which a release speaks to a platform, and the platforms behind it."""
