/*
schedule.h: the values of dev/doc/design.md at the corners of the curve, its shape between them, and very
short runs.
*/
#ifndef TEST_SCHEDULE_H
#define TEST_SCHEDULE_H

#include "llmc/schedule.h"
#include "harness.h"

static int schedule_near(double got, double want) {
    return fabs(got - want) <= 1e-12 * want;
}

static void test_schedule_corners(void) {
    const Schedule s = {5e-4, 5e-5, 600, 60000};
    CHECK(schedule_near(schedule_lr(s, 0), 5e-4 / 600));
    CHECK(schedule_near(schedule_lr(s, 299), 2.5e-4));
    CHECK(schedule_near(schedule_lr(s, 599), 5e-4)); // the end of the warm-up
    CHECK(schedule_near(schedule_lr(s, 600), 5e-4)); // and the cosine's beginning
    CHECK(schedule_lr(s, 601) < 5e-4);
    CHECK(schedule_lr(s, 59998) > 5e-5 && schedule_lr(s, 59998) < 5.00001e-5);
    CHECK(schedule_lr(s, 59999) == 5e-5 && schedule_lr(s, 60000) == 5e-5 &&
          schedule_lr(s, INT64_MAX) == 5e-5);
    const Schedule odd = {1.0, 0.2, 2, 103}; // i - W = 50 of 100 is half way, 25 a quarter turn
    CHECK(schedule_near(schedule_lr(odd, 52), 0.6));
    CHECK(schedule_near(schedule_lr(odd, 27), 0.2 + 0.4 * (1.0 + sqrt(0.5))));
}

static void test_schedule_falls(void) {
    const Schedule s = {1e-3, 1e-4, 10, 1000};
    int wrong = 0;
    for (int64_t i = 1; i < 1000; i++) {
        double before = schedule_lr(s, i - 1), here = schedule_lr(s, i);
        wrong += i < 10 ? here <= before : i == 10 ? here != before : here >= before;
    }
    CHECK(wrong == 0);
}

static void test_schedule_short(void) {
    const Schedule none = {1e-3, 1e-4, 0, 3}, one = {1e-3, 1e-4, 0, 1}, two = {1e-3, 1e-4, 1, 2};
    const Schedule all = {1e-3, 1e-4, 5, 5}, beyond = {1e-3, 1e-4, 10, 5}, flat = {1e-3, 1e-3, 0, 10};
    CHECK(schedule_lr(none, 0) == 1e-3 && schedule_near(schedule_lr(none, 1), 5.5e-4) &&
          schedule_lr(none, 2) == 1e-4);
    CHECK(schedule_lr(one, 0) == 1e-4); // the last step is also the first
    CHECK(schedule_lr(two, 0) == 1e-3 && schedule_lr(two, 1) == 1e-4);
    CHECK(schedule_near(schedule_lr(all, 4), 1e-3) && schedule_near(schedule_lr(beyond, 4), 5e-4));
    CHECK(schedule_lr(flat, 0) == 1e-3 && schedule_lr(flat, 5) == 1e-3 && schedule_lr(flat, 9) == 1e-3);
}

static void test_schedule(void) {
    test_schedule_corners();
    test_schedule_falls();
    test_schedule_short();
}

#endif
