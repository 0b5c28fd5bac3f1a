import os
import sys
import threading

import pytest

from serving.priority import low_priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority each on Linux only")


def nice(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def run_in_thread(body: object) -> None:
    failures = []

    def guarded() -> None:
        try:
            body()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(20)
    for error in failures:
        raise error


def start_waiting() -> tuple[threading.Thread, threading.Event]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(20,))
    thread.start()
    return thread, end


def test_priority_is_low_in_the_block_and_usual_after_it_for_new_threads_too() -> None:
    def body() -> None:
        own = threading.get_native_id()
        usual = nice(own)
        with low_priority():
            lowered = nice(own)
            inside, end = start_waiting()
            ended = threading.Thread(target=int)
            ended.start()
            ended.join()
        after, end_after = start_waiting()
        try:
            assert lowered in (min(usual + 10, 19), usual)  # the latter where it could not be undone
            assert [nice(thread) for thread in (own, inside.native_id or 0, after.native_id or 0)] == [usual] * 3
        finally:
            end.set()
            end_after.set()

    run_in_thread(body)
    assert nice(0) == nice(threading.get_native_id())


def test_priority_stays_where_it_could_not_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = os.setpriority

    def refuse_to_raise(which: int, who: int, value: int) -> None:
        if value <= nice(who):
            raise PermissionError
        lower(which, who, value)

    monkeypatch.setattr(os, "setpriority", refuse_to_raise)

    def body() -> None:
        usual = nice(threading.get_native_id())
        with low_priority():
            assert nice(threading.get_native_id()) == usual

    run_in_thread(body)


def test_priority_is_usual_again_when_the_block_raises() -> None:
    def body() -> None:
        usual = nice(threading.get_native_id())
        with pytest.raises(ValueError, match="inside"), low_priority():
            raise ValueError("inside")
        assert nice(threading.get_native_id()) == usual

    run_in_thread(body)
