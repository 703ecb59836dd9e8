"""Stories graded by a large language model: `python -m evaluation judge --help`.

judging.py   main, write_stories: the command line; runs write stories, and the judge grades them
prompts.py   read_prompts, Prompt: what the stories begin with, and the questions to the judge
endpoint.py  Endpoint: ask an OpenAI-compatible server, and keep its answers
verdict.py   Judgement: grades and preferences from the answers
"""
