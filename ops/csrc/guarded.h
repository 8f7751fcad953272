// How a function of the shim fails: it returns 1 and leaves the exception's text.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

inline thread_local std::string phx_last_error_text;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const c10::Error &e) {
    phx_last_error_text = e.what_without_backtrace();
    return 1;
  } catch (const std::exception &e) {
    phx_last_error_text = e.what();
    return 1;
  }
}
