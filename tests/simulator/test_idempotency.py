from simulator.caller import Caller, Calling, refusal

KEY = {"Idempotency-Key": "01JD:upgrade"}


def test_a_repeat_is_answered_with_the_stored_answer(caller: Caller) -> None:
    first = caller.upgrade(headers=KEY)
    second = caller.upgrade(headers=KEY)
    assert first.json() == second.json() == {"data": {"templateIds": [1343170]}}
    [written] = caller.cloud.record()
    assert written.idempotency_key == "01JD:upgrade"


def test_a_repeat_with_another_body_is_409002(caller: Caller) -> None:
    caller.upgrade(headers=KEY)
    assert refusal(caller.upgrade(headers=KEY, description="other")) == (409, 409002)
    assert len(caller.cloud.record()) == 1


def test_a_repeat_to_another_path_is_409002(caller: Caller) -> None:
    caller.publish(headers=KEY)
    assert refusal(caller.publish(template=1342977, headers=KEY)) == (409, 409002)


def test_a_stored_answer_is_forgotten_after_24_hours(caller: Caller) -> None:
    caller.upgrade(headers=KEY)
    caller.cloud.advance(24 * 3600 + 1)
    assert caller.upgrade(headers=KEY).json() == {"data": {"templateIds": [1343171]}}


def test_a_refusal_is_not_stored(calling: Calling) -> None:
    caller = calling(publish_lock=5)
    caller.publish()
    assert refusal(caller.publish(headers=KEY)) == (409, 409001)
    caller.cloud.advance(5)
    assert caller.publish(headers=KEY).status_code == 200


def test_an_installation_may_ignore_the_key(calling: Calling) -> None:
    caller = calling(idempotency=False)
    answers = [caller.upgrade(headers=KEY).json()["data"]["templateIds"] for _ in range(2)]
    assert answers == [[1343170], [1343171]]


def test_an_answer_lost_on_the_wire_is_given_to_the_repeat(calling: Calling) -> None:
    lost = {"call": "upgrade", "nth": 1, "kind": "status", "status": 504, "takes_effect": True}
    caller = calling(faults=[lost])
    assert refusal(caller.upgrade(headers=KEY)) == (504, 0)
    assert caller.upgrade(headers=KEY).json() == {"data": {"templateIds": [1343170]}}
    assert len(caller.cloud.record()) == 1
