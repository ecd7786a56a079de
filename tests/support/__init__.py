"""What tests of several folders share: ways to wait, and fakes for pure unit tests."""
