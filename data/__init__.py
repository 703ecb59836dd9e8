"""From stories to batches: sources, packing into rows, the training set on disk, and the cache folder.

dataset.py   load_data, Data, choose_validation, fingerprint: the training set and its validation stories
sources.py   open_source, read_stories: stories from the hub, from local files, or from storyworld
packing.py   pack, story_ids: rows of whole stories, without padding
plugin.py    DataPlugin, source_of: own rows, memories and stories;  checks.py: check_rows, before they are trained on
tokenizer_class.py    load_class: a tokenizer of one's own, checked
cache.py     default_cache_dir, open_or_build, say, digest, first_line: files that are computed once; no torch
storyworld/  the built-in world of stories
"""
