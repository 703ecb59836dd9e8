"""Numbers of one model: scores, losses by story, cost, and grades of the storyworld."""
