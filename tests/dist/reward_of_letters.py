"""A user's reward, for tests/dist/test_rollouts.py: found beside the script that trains."""


def judge(text: str, row: dict) -> float:
    if text.startswith("!"):
        raise ValueError("answers do not begin so")
    return sum(letter in "etaoin" for letter in text) / (1 + len(text))
