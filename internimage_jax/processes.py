"""Processes that share an evaluation."""


class Group:
    index, count = 0, 1

    def check(self) -> None: ...
    def check_same(self, settings) -> None: ...
    def exchange(self, data):
        return [data]
