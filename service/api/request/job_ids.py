"""UUIDs that clients choose for jobs, in PUT /jobs/{id}.

A chosen UUID is the name by which its job is found, as an Idempotency-Key is, and not the job's id. So the same UUID of
two keys is two jobs, and nobody learns from an answer that another has used it.
"""

import re

from tminus.service.errors import InvalidField

CHOSEN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHOSEN_BOUND = "a UUID, as 6f9619ff-8b86-4011-b42d-00c04fc964ff, in small letters"


def check_chosen(chosen: str) -> None:
    """Raise InvalidField for what is no UUID in its usual spelling."""
    if not CHOSEN.fullmatch(chosen):
        raise InvalidField.of("job_id", CHOSEN_BOUND, chosen)
