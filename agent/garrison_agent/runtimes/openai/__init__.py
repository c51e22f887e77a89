"""OpenAI's API over a text engine, and what the other text APIs share with it: answers, tools, chat templates."""
