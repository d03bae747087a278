# SPDX-License-Identifier: Apache-2.0
"""Accounts and the token bucket."""

from __future__ import annotations

from ism.manager.quota import Account, DomainAccount, Quota, TokenBucket


def test_a_region_over_either_limit_may_not_be_owned() -> None:
    account = Account(Quota(bytes=100, regions=2, attachments=1))
    assert account.may_own(100)
    assert not account.may_own(101)
    account.own(10)
    account.own(10)
    assert not account.may_own(1)


def test_who_inherited_beyond_its_quota_may_neither_allocate_nor_attach() -> None:
    account = Account(Quota(bytes=100, regions=2, attachments=5))
    account.attach()
    account.inherit(101)
    assert not account.may_attach()
    assert not account.may_own(1)
    account.detach(101)
    assert account.may_attach()
    assert account.may_own(100)
    assert (account.bytes, account.regions, account.attachments) == (0, 0, 0)


def test_a_domain_without_limit_takes_everything() -> None:
    assert DomainAccount().may_add(1 << 60)
    limited = DomainAccount(10)
    limited.add(4)
    assert limited.may_add(6)
    assert not limited.may_add(7)


def test_a_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    bucket = TokenBucket(10, burst=2, now_s=5.0)
    assert [bucket.take(5.0) for _ in range(3)] == [True, True, False]
    assert not bucket.take(5.05)
    assert bucket.take(5.101)
    assert not bucket.take(5.102)


def test_a_bucket_never_holds_more_than_its_burst_and_survives_a_clock_going_back() -> None:
    bucket = TokenBucket(10, burst=2, now_s=0.0)
    assert [bucket.take(1000.0) for _ in range(3)] == [True, True, False]
    assert not bucket.take(999.0)
    assert bucket.take(1000.11)


def test_what_was_refused_is_not_counted() -> None:
    bucket = TokenBucket(1, burst=3)
    assert not bucket.take(0.0, 4)
    assert bucket.take(0.0, 3)


def test_rate_zero_means_no_limit() -> None:
    bucket = TokenBucket(0)
    assert all(bucket.take(0.0) for _ in range(1000))
