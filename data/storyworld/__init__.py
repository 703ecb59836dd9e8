"""The built-in world of stories, whose every probability is known exactly."""
