"""The words incident reports are made of; `incidents` decides what is true and picks among them.

Phrasings of opposite facts share their nouns on purpose ("no data was lost" / "data was lost"), so that no single word
gives a fact away. Fields in braces are filled per report: `{s}` the failing service, `{n}` a number.
"""

from __future__ import annotations

SERVICES: dict[str, tuple[str, ...]] = {
    "auth": ("login gateway", "session store", "token service"),
    "payments": ("card processor", "refund worker", "billing ledger"),
    "search": ("query router", "index builder", "suggestion api"),
    "storage": ("object store", "upload proxy", "archive bucket"),
    "database": ("orders table", "read replica", "schema migrator"),
    "network": ("edge proxy", "dns resolver", "load balancer"),
    "reporting": ("sales dashboard", "export job", "audit log"),
    "mobile": ("android app", "link handler", "push sender"),
}
"""Component -> the services that belong to it: a report names the service, an answer names both."""

SYMPTOMS: dict[str, tuple[str, ...]] = {
    "times out": (
        "Requests to the {s} time out{env}",
        "The {s} hangs{env} until the client gives up",
        "Calls to the {s} never return{env}",
    ),
    "returns {code} errors": (
        "The {s} answers with {code} errors{env}",
        "We see a wave of {code} responses from the {s}{env}",
        "Error {code} comes back from the {s}{env}",
    ),
    "crashes on start": (
        "The {s} crashes on start{env}",
        "After a restart the {s} dies at once{env}",
        "The {s} does not come up{env}",
    ),
    "runs out of memory": (
        "The {s} runs out of memory{env}",
        "Memory of the {s} grows until it is killed{env}",
        "The kernel keeps killing the {s} for its memory{env}",
    ),
    "shows stale data": (
        "The {s} shows data from yesterday{env}",
        "Changes do not reach the {s}{env}",
        "The {s} is {n} hours behind{env}",
    ),
    "sends duplicates": (
        "The {s} sends everything twice{env}",
        "Duplicates come out of the {s}{env}",
        "The {s} repeats the same item {n} times{env}",
    ),
    "rejects valid input": (
        "The {s} rejects valid input{env}",
        "Valid requests are refused by the {s}{env}",
        "Correct forms fail in the {s}{env}",
    ),
    "refuses connections": (
        "The {s} refuses connections{env}",
        "Nobody can connect to the {s}{env}",
        "Port {n} of the {s} is closed{env}",
    ),
}
"""What an answer's summary says -> how a report may say it; `{env}` is a place such as " in production"."""

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "production": (" in production", " on the live site", " on the live cluster"),
    "staging": (" in staging", " on the staging cluster", " on the test site"),
}

ENVIRONMENT_ASIDES: dict[str, tuple[str, ...]] = {
    "production": ("Staging is fine", "The test site works"),
    "staging": ("Production is fine", "The live site works"),
}
"""What a report may add: it names the environment that is *not* affected."""

SCOPES: dict[str, tuple[str, ...]] = {
    "most": (
        "Every user is affected",
        "All customers see it",
        "Nine in ten users are affected",
        "No region works",
    ),
    "some": (
        "Several users are affected",
        "Some customers see it",
        "One in ten users is affected",
        "One region does not work",
    ),
    "few": (
        "A single user is affected",
        "Only one customer sees it",
        "Fewer than ten users are affected",
        "Nobody else is affected",
    ),
}

DATA_LOSS: dict[bool, tuple[str, ...]] = {
    True: (
        "Data was lost",
        "{n} records are gone for good",
        "Some writes were lost and cannot be replayed",
        "The last {n} minutes of data are not in the backup",
    ),
    False: (
        "No data was lost",
        "No records are gone",
        "Some writes were late but all were replayed",
        "The last {n} minutes of data are in the backup",
        "",
    ),
}
"""An empty phrasing means that the report does not speak of it."""

WORKAROUND: dict[bool, tuple[str, ...]] = {
    True: (
        "Retrying helps",
        "There is a workaround",
        "Clearing the cache fixes it for {n} hours",
        "The old page can be used instead",
    ),
    False: (
        "Retrying does not help",
        "There is no workaround",
        "Clearing the cache does not fix it",
        "The old page cannot be used either",
        "",
    ),
}

CAUSES: dict[str, tuple[str, ...]] = {
    "roll back release {v}": (
        "It started after release {v}",
        "Release {v} went out just before",
        "Version {v} was deployed an hour earlier",
    ),
    "turn off flag {flag}": (
        "Flag {flag} was turned on today",
        "It began when flag {flag} was enabled",
        "Only with flag {flag} does it happen",
    ),
    "add capacity to {s}": (
        "Traffic is {n} times the usual",
        "A campaign brought a peak of visitors",
        "The load has doubled since noon",
    ),
    "renew the certificate": (
        "The certificate expired last night",
        "The log says that the certificate is not valid",
        "The handshake fails on an old certificate",
    ),
    "free disk on {host}": (
        "The disk of {host} is full",
        "{host} has no space left",
        "Writes on {host} fail for lack of space",
    ),
    "page the owner": (
        "The cause is not known",
        "The logs show nothing",
        "Nothing was changed on our side",
    ),
}
"""The next action an answer gives -> the cause a report names for it."""

FLAGS = ("fast-path", "new-router", "dark-mode", "bulk-edit", "lazy-load", "two-step")
HOSTS = ("node", "rack", "disk", "blade")
CODES = (400, 401, 403, 404, 429, 500, 502, 503, 504)
TEAMS = ("support", "sales", "the night shift", "the on-call engineer", "a partner", "the warehouse")

DISTRACTORS = (
    "Reported by {team} on {day}",
    "The {other} was checked and is healthy",
    "The {other} is not involved",
    "The reporter asks for {severity} priority",
    "Last time this was closed as {severity}",
    "A meeting is planned for {day}",
    "{team} opened {n} tickets about it",
)
"""True but irrelevant: other services, and severities that somebody else chose."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
