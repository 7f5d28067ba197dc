"""A token bucket: how often something may happen, with a second's worth of it at once.

This module must never read a clock nor wait: the caller says what time it is, and what to do without tokens.
"""


class TokenBucket:
    """`rate` tokens a second, at most one second's worth saved up."""

    def __init__(self, rate: float, now_s: float) -> None:
        self.rate = rate
        self.tokens = float(rate)
        self.refilled_s = now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Takes the amount, all or nothing; False if there is not enough."""
        self._refill(now_s)
        if self.tokens < amount:
            return False
        self.tokens -= amount
        return True

    def charge(self, amount: float, now_s: float) -> None:
        """Takes the amount whether it is there or not; a debt has to be refilled before the next take."""
        self._refill(now_s)
        self.tokens -= amount

    def _refill(self, now_s: float) -> None:
        self.tokens = min(self.rate, self.tokens + (now_s - self.refilled_s) * self.rate)
        self.refilled_s = now_s
