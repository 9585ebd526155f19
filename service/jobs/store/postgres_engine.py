"""Connections to PostgreSQL, bounded in time."""

import sqlalchemy as sa

STATEMENT_S = 10.0  # a statement that takes longer is given up, so that a lease can be renewed in time
CONNECT_S = 5


def connect(url: str, namespace: str) -> sa.Engine:
    """An engine for a database, and no connection yet. What the URL sets holds, and our options hold beside its own.

    Raises ValueError for what is no URL of PostgreSQL.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ValueError("it is no URL, as postgresql://user@host/database is") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"it must begin with postgresql://, not with {parsed.drivername}://")
    limit_ms = round(1000 * STATEMENT_S)
    # The database has these too, or it would keep for two hours what a server held as its packets were lost, or as it
    # was stopped in a transaction: connections, and locks on jobs, which no other could claim.
    of_the_database = {
        "statement_timeout": limit_ms,
        "lock_timeout": limit_ms,
        "idle_in_transaction_session_timeout": limit_ms,
        "tcp_keepalives_idle": 5,
        "tcp_keepalives_interval": 2,
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": limit_ms,
    }
    own_options = " ".join(f"-c {name}={value}" for name, value in of_the_database.items())
    arguments = {
        "connect_timeout": CONNECT_S,
        "application_name": f"tminus {namespace}",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": limit_ms,
        "options": own_options,
        "prepare_threshold": None,  # a proxy that pools by transaction gives each one another connection
    }
    arguments = {name: value for name, value in arguments.items() if name not in parsed.query}
    if "options" in parsed.query:  # of two values the later one holds
        arguments["options"] = " ".join([own_options, *parsed.normalized_query["options"]])
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"), connect_args=arguments,
        pool_size=2, max_overflow=0, pool_timeout=5, pool_pre_ping=True,
    )  # fmt: skip
