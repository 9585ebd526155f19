"""UUIDs that clients choose for jobs, in PUT /jobs/{id}, and the ids of these jobs.

A chosen UUID leads to a job only for the key that chose it: the job's own id is a hash of both. So the same UUID of two
keys is two jobs, and nobody learns from an answer that another has used it.
"""

import hashlib
import re

from tminus.service.errors import InvalidField

CHOSEN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHOSEN_BOUND = "a UUID, as 6f9619ff-8b86-4011-b42d-00c04fc964ff, in small letters"


def own_id(chosen: str, owner: str) -> str:
    """The id of the job that an owner has chosen a UUID for: 32 hexadecimal digits, as others have."""
    return hashlib.sha256(f"{owner}\x1f{chosen}".encode()).hexdigest()[:32]


def check_chosen(chosen: str) -> None:
    """Raise InvalidField for what is no UUID in its usual spelling."""
    if not CHOSEN.fullmatch(chosen):
        raise InvalidField.of("job_id", CHOSEN_BOUND, chosen)
