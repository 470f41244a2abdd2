"""Sources of all kinds, alone and together: what `tests.kept.pulling` plays. Their traces lie in pulls.json.

A scenario in which something has to happen while a source is in the middle says so by ``until``: nothing here depends
on who is quicker.
"""

from __future__ import annotations

from typing import Any

from tests.kept.pulling import Scenario, Step

__all__ = ["SCENARIOS"]

Script = tuple[Step, ...]

OPENED: Script = ("welcome", "accept", "offer")
GOOD: Script = (*OPENED, "serve")
DOWN: tuple[Script, ...] = ()
TOKEN = b"a secret, long enough"


def refusing(code: str, **more: Any) -> Script:
    return ("welcome", "identify", ("refuse", {"code": code, **more}))


def sending_to(*relays: str) -> Script:
    return refusing("busy", retry_after=0.01, sources=list(relays))


ONE: dict[str, Scenario] = {
    "a good one": Scenario({"a": [GOOD]}),
    "whatever it holds": Scenario({"a": [GOOD]}, pull={"adopt": True}),
    "a question only": Scenario({"a": [("welcome", "accept")]}, pull={"probe": True}),
    "down": Scenario({"a": DOWN}),
    "no source": Scenario({}),
    "down at first, waited for": Scenario({"a": [("cut",), refusing("not-ready"), GOOD]}, pull={"wait": 60.0}),
    "a queue": Scenario({"a": [("welcome", "identify", ("wait", 2), ("wait", 1), *OPENED[1:], "serve")]}),
    "it wants a token": Scenario({"a": [refusing("auth")]}),
    "a token": Scenario({"a": [(("welcome", {"token": TOKEN}), *GOOD[1:])]}, pull={"token": TOKEN}),
    "another token": Scenario({"a": [(("welcome", {"token": b"another one, long"}),)]}, pull={"token": TOKEN}),
    "no token there": Scenario({"a": [GOOD]}, pull={"token": TOKEN}),
    "another protocol": Scenario({"a": [(("welcome", {"protocol": 3}),)]}),
    "no common transport": Scenario({"a": [(("welcome", {"abilities": [{"name": "carrier"}]}), "accept")]}),
    "another model than it should": Scenario({"a": [("welcome", ("accept", {"identity": {"dtype": "float8"}}))]}),
    "a plan of its own": Scenario({"a": [("welcome", ("accept", {"plan": "00" * 32}))]}),
    "a root that is not that of its digests": Scenario({"a": [("welcome", ("accept", {"root": "00" * 32}))]}),
    "an unknown block digest": Scenario({"a": [("welcome", ("accept", {"algorithm": "sum"}))]}),
    "blocks before its turn": Scenario({"a": [("welcome", "identify", ("say", ("Grant", {"ranges": [[0, 1]]})))]}),
    "garbage": Scenario({"a": [("welcome", "identify", ("raw", b"\0\0\0\4none"))]}),
    "blocks that nobody asked for": Scenario({"a": [(*OPENED, ("say", ("Grant", {"ranges": [[90, 91]]})))]}),
    "silent": Scenario({"a": [("welcome",)]}, pull={"timeout": 1.0}),
    "nothing comes on the data channel": Scenario(
        {"a": [(*OPENED, ("give", 3), ("grant", 10))]}, pull={"stall_timeout": 2.0}
    ),
    "a request without an answer": Scenario({"a": [(*OPENED, ("give", 3))]}, pull={"stall_timeout": 2.0}),
    "it sends us through ourselves": Scenario({"a": [("welcome", ("accept", {"through_client": True}))]}),
    "it sends us through ourselves later": Scenario({"a": [(*OPENED, ("want", 1), ("upstream", "client"))]}),
    "it gets its blocks elsewhere": Scenario({"a": [(*OPENED, ("give", 1), ("upstream", "other"), "serve")]}),
    "broken in the middle, and good": Scenario({"a": [(*OPENED, ("give", 3), ("grant", 1), "cut_data"), GOOD]}),
    "broken again and again": Scenario({"a": [(*OPENED, ("give", 3), ("grant", 1), "cut_data")]}),
    "expected weights": Scenario({"a": [GOOD]}, pull={"expect": 0}),
    "other than expected": Scenario({"a": [GOOD]}, pull={"expect": 1}),
    "some blocks only": Scenario({"a": [(*OPENED, ("deny", {"blocks": [3, 4]}), "serve")]}),
    "passing on": Scenario({"a": [GOOD]}, pull={"relay": True}),
}

FIRST: dict[str, Script] = {
    "cut before a word": ("cut",),
    "cut in LISTEN": ("hello", "cut"),
    "a word out of turn": (("say", ("Waiting", {"reason": "?"})),),
    "cut in VALIDATE": ("welcome", "identify", "cut"),
    "cut in PLAN": ("welcome", "accept", "agree", "cut"),
    "cut in TRANSFER": (*OPENED, ("give", 3), "cut"),
    "the data channel alone is cut": (*OPENED, ("give", 3), ("grant", 1), "cut_data"),
    "it leaves in the middle": (*OPENED, ("give", 3), ("leave", "internal")),
    "it stops": (*OPENED, ("give", 3), ("leave", "gone")),
    "a lie": (*OPENED, ("give", 3), ("lie", 1)),
    "a lie, then a cut": (*OPENED, ("give", 3), ("lie", 1), "cut_data"),
    "some blocks only": (*OPENED, ("deny", {"blocks": [3, 4, 12]}), "serve"),
    "all blocks gone": (*OPENED, ("deny", {"blocks": list(range(13))}), "serve"),
    "refused by the transport": ("welcome", "accept", "agree", ("refuse", "transport")),
}
"""What the first of two sources does; the second one is good."""

CODES = (
    *("version", "auth", "not-held", "identity", "manifest", "root", "plan", "transport", "not-ready", "busy"),
    *("gone", "relay", "timeout", "protocol", "internal"),
)

TWO: dict[str, Scenario] = {
    **{f"{name}, then a good one": Scenario({"a": [script], "b": [GOOD]}) for name, script in FIRST.items()},
    **{f"refused: {code}, then a good one": Scenario({"a": [refusing(code)], "b": [GOOD]}) for code in CODES},
    "down, then a good one": Scenario({"a": DOWN, "b": [GOOD]}),
    "other weights after some blocks": Scenario({"a": [(*OPENED, ("give", 3), "cut")], "b": [refusing("root")]}),
    "other weights after some blocks, in silence": Scenario(
        {"a": [(*OPENED, ("give", 3), "cut")], "b": [("welcome", ("accept", {"seed": 1}))]}
    ),
    "other weights, then the expected ones": Scenario(
        {"a": [("welcome", ("accept", {"seed": 1}))], "b": [GOOD]}, pull={"expect": 0}
    ),
    "too slow for the source, which is asked last": Scenario(
        {
            "a": [(*OPENED, ("give", 3), ("leave", "timeout")), GOOD],
            "b": [(*OPENED, ("deny", {"blocks": [9]}), "serve")],
        }
    ),
    "another transport at the same source": Scenario(
        {"a": [("welcome", "accept", "agree", ("refuse", "transport")), GOOD]}, pull={"transport": ["shm", "tcp"]}
    ),
    "each has what the other lacks": Scenario(
        {
            "a": [(*OPENED, ("deny", {"blocks": [3, 4]}), "serve")],
            "b": [(*OPENED, ("deny", {"blocks": [0, 1]}), "serve")],
        }
    ),
    "nobody has one block": Scenario(
        {
            "a": [(*OPENED, ("deny", {"blocks": [3, 4]}), "serve")],
            "b": [(*OPENED, ("deny", {"blocks": [4]}), "serve")],
        }
    ),
    "not ready, then another, both waited for": Scenario(
        {"a": [refusing("not-ready", retry_after=86400)], "b": [("cut",), GOOD]}, pull={"wait": 60.0}
    ),
}

RELAYS: dict[str, Scenario] = {
    "sent to a relay": Scenario({"a": [sending_to("r")], "r": [GOOD]}, given=["a"]),
    "not to be sent on": Scenario({"a": [GOOD]}, pull={"follow": False}),
    "sent to a relay that is down": Scenario({"a": [sending_to("r"), GOOD], "r": DOWN}, given=["a"]),
    "sent to a relay that is cut": Scenario(
        {"a": [sending_to("r"), GOOD], "r": [(*OPENED, ("give", 3), "cut")]}, given=["a"]
    ),
    "sent to a relay that lies": Scenario(
        {"a": [sending_to("r"), GOOD], "r": [(*OPENED, ("give", 3), ("lie", 1))]}, given=["a"]
    ),
    "sent to a relay that is not ready at first": Scenario(
        {"a": [sending_to("r")], "r": [refusing("not-ready", retry_after=0.01), GOOD]}, given=["a"]
    ),
    "sent to a relay that is not for us": Scenario(
        {"a": [sending_to("r"), GOOD], "r": [refusing("relay")]}, given=["a"]
    ),
    "sent to two relays": Scenario(
        {"a": [sending_to("r", "s"), GOOD], "r": [GOOD], "s": [(*OPENED, ("give", 3), "cut")]}, given=["a"]
    ),
    "sent on by a relay": Scenario({"a": [sending_to("r")], "r": [sending_to("s")], "s": [GOOD]}, given=["a"]),
    "a circle": Scenario({"a": [sending_to("b"), GOOD], "b": [sending_to("a"), GOOD]}),
    "sent to itself": Scenario({"a": [sending_to("a")]}),
    "a relay that stops, and names its source": Scenario(
        {
            "a": [sending_to("r")],
            "r": [(*OPENED, ("give", 3), ("refuse", {"code": "gone", "sources": ["s"]}))],
            "s": [GOOD],
        },
        given=["a"],
    ),
    "blocks that are elsewhere": Scenario(
        {"a": [(*OPENED, ("deny", {"blocks": [3, 4], "sources": ["s"]}), "serve")], "s": [GOOD]}, given=["a"]
    ),
    "relays before servers": Scenario({"a": [sending_to("r")], "b": [GOOD], "r": [GOOD]}, given=["a", "b"]),
}

WAITS: Script = (*OPENED, ("give", 3))

TOGETHER: dict[str, Scenario] = {
    "the first decides, the second is parked": Scenario(
        {"a": [(*WAITS, ("until", "b:Agree"), "serve")], "b": [GOOD]}, loose=["b"], pull={"stripe": 2}
    ),
    "the second takes over what is lost": Scenario(
        {
            "a": [(*WAITS, ("until", "b:open"), "cut"), refusing("not-held")],
            "b": [(*OPENED, ("tell", "open"), ("want", 1), ("until", "a:over 2"), "serve")],
        },
        pull={"stripe": 2},
    ),
    "the second takes over from a slow one": Scenario({"a": [(*WAITS, ("grant", 1))], "b": [GOOD]}, pull={"stripe": 2}),
    "the second takes over what is denied": Scenario(
        {
            "a": [(*WAITS, ("until", "b:open"), ("deny", {"blocks": [7, 8]}), "serve")],
            "b": [(*OPENED, ("tell", "open"), ("want", 1), ("until", "a:over 1"), "serve")],
        },
        pull={"stripe": 2},
    ),
    "the first queues, the second decides": Scenario(
        {
            "a": [("welcome", "identify", ("wait", 1), ("until", "b:Want"), *OPENED[1:], ("tell", "open"), "serve")],
            "b": [(*WAITS, ("until", "a:open"), "serve")],
        },
        loose=["a"],
        pull={"stripe": 2},
    ),
    "the second has other weights": Scenario(
        {"a": [(*WAITS, ("until", "b:over 1"), "serve")], "b": [("welcome", ("accept", {"seed": 1}))]},
        pull={"stripe": 2},
    ),
    "the first lies, the second takes over": Scenario(
        {"a": [(*WAITS, ("until", "b:open"), ("lie", 1))], "b": [(*OPENED, ("tell", "open"), "serve")]},
        pull={"stripe": 2},
    ),
    "the second is cut while it is parked": Scenario(
        {"a": [(*WAITS, ("until", "b:over 1"), "serve")], "b": [(*OPENED, "cut")]}, pull={"stripe": 2}
    ),
    "two of three": Scenario(
        {
            "a": [(*WAITS, ("until", "b:open"), "cut"), refusing("not-held")],
            "b": [(*OPENED, ("tell", "open"), ("give", 3), ("until", "c:open"), "cut"), refusing("not-held")],
            "c": [(*OPENED, ("tell", "open"), ("want", 1), ("until", "b:over 2"), "serve")],
        },
        pull={"stripe": 2},
    ),
    "what is asked for ahead": Scenario(
        {
            "a": [(*OPENED, ("want", 1), ("until", "b:Want"), "serve")],
            "b": [(*OPENED, "serve")],
        },
        pull={"stripe": 2},
        rows=40 << 10,
        block_bytes=1 << 20,
        shares=False,
    ),
}

SCENARIOS: dict[str, Scenario] = {
    f"{kind}: {name}": scenario
    for kind, scenarios in {"one": ONE, "two": TWO, "relays": RELAYS, "together": TOGETHER}.items()
    for name, scenario in scenarios.items()
}
