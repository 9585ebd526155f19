"""The microservice. Its layers, from the bottom up; each imports from itself and those before it:

words (the modules at the top of this folder), images, scheduling, engine, worker, jobs, access, api, startup,
ray_serve, cli. The client and the page stand apart. tests/service/test_imports.py holds the rule.
"""
