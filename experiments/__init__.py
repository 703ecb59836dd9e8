"""Other people's ideas, one folder each. The core imports none of them by itself: a config names the plugins that it wants."""
