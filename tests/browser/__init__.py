"""A headless browser for the tests of pages: see `chromium`."""
