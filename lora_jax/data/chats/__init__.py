"""Chats → token ids and which of them are trained, through a model's chat template.

`messages` reads them as data has them, `forms` says how templates may expect them, `template`
renders them with borders, `chat` encodes them, and `clock` keeps a template's time. Imports
nothing else of the project.
"""
