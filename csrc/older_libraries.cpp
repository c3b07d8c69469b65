// A wheel runs with older C and C++ libraries than it was built with: what is new in those is made here of what is old.
#include <exception>
#include <new>

#if defined(__GLIBC__) && defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11

// std::shared_ptr reads this variable of glibc 2.32, where there is one. Ours says that there are threads.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// The headers of gcc 11 copy and destroy a std::exception_ptr in line, through two new functions of its library. Older
// ones have them as parts of what they do have: the constructor from a thrown object, and std::nested_exception's end.
extern "C" {
void fastema_refer(void* pointer, void* thrown) asm("_ZNSt15__exception_ptr13exception_ptrC1EPv");
void fastema_end(void* nested) asm("_ZNSt16nested_exceptionD1Ev");
}
asm(".hidden _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
asm(".hidden _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
asm(".hidden _ZSt28__throw_bad_array_new_lengthv");

namespace std {

void __exception_ptr::exception_ptr::_M_addref() noexcept {
  void* never_destroyed;
  fastema_refer(&never_destroyed, _M_exception_object);
}

void __exception_ptr::exception_ptr::_M_release() noexcept {
  void* nested[] = {nullptr, _M_exception_object};  // the first: its table of virtual functions
  static_assert(sizeof(nested) == sizeof(nested_exception));
  _M_exception_object = nullptr;
  fastema_end(nested);
}

void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std

#endif
