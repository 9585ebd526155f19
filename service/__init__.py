"""The image server.

Its layers, from the bottom up, are: words (the modules directly in this folder), images, scheduling, engine, worker,
jobs, access, api, startup, ray_serve, cli. A layer imports only itself and lower layers. The client and the page are
outside the layers. tests/service/test_imports.py checks these rules.
"""
