"""Tests that need a program which is missing say so by name, and fail where it could have been installed."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.discovery import services


def missing(monkeypatch: pytest.MonkeyPatch, *, ci: str, root: bool, apt: bool) -> pytest.ExceptionInfo[BaseException]:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" and apt else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setenv("CI", ci)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:
        services.needs("etcdctl")
    assert str(caught.value) == "etcdctl is not installed (package etcd-client): `make services` installs it"
    return caught


@pytest.mark.parametrize(
    ("ci", "root", "apt", "fails"),
    [
        ("true", True, True, True),
        ("true", False, True, False),
        ("true", True, False, False),
        ("", True, True, False),
    ],
)
def test_what_is_missing(ci: str, root: bool, apt: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    caught = missing(monkeypatch, ci=ci, root=root, apt=apt)
    assert caught.errisinstance(pytest.fail.Exception) is fails
