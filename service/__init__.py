"""The microservice: HTTP edge, scheduler, engine, worker."""
