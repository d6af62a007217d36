// Whether functions that are looked up by their names at run time are those of a library's own header.
#pragma once

#include <type_traits>

namespace fastserve::cuda {

// Of what is passed, only that counts which decides where it is passed: an enum of theirs may be an int of ours.
template <class Ours, class Theirs>
inline constexpr bool kPassedAlike =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs> &&
    std::is_class_v<Ours> == std::is_class_v<Theirs>;

template <class Ours, class Theirs>
inline constexpr bool kCalledAlike = false;
template <class Result, class... Arguments, class TheirResult, class... TheirArguments>
requires(sizeof...(Arguments) == sizeof...(TheirArguments)) inline constexpr bool kCalledAlike<
    Result (*)(Arguments...), TheirResult (*)(TheirArguments...)> = kPassedAlike<Result, TheirResult> &&
                                                                    (kPassedAlike<Arguments, TheirArguments> && ...);

// A function of theirs as we call it.
template <class Ours, class Theirs>
Ours called_as(Theirs theirs) {
  static_assert(kCalledAlike<Ours, Theirs>);
  return reinterpret_cast<Ours>(reinterpret_cast<void*>(theirs));
}

}  // namespace fastserve::cuda
