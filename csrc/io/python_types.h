// Python types and values of C++ ones, on Python's stable ABI: one binary serves every Python from
// 3.10 on. The buffer interface is a part of that ABI since 3.11, and is the same in 3.10.
#pragma once

#include <patchlevel.h>
#include <pyconfig.h>
#if PY_VERSION_HEX >= 0x030b0000 && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "io/errors.h"

namespace realign_fast::io::python {

// Thrown where a function of Python has failed; Python knows the error already.
struct ErrorIsSet {};

inline PyObject* not_plain = nullptr;  // the exception class of NotPlain

// Sets Python's error to the exception that is being handled.
inline void set_error() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const NotPlain& error) {
    PyErr_SetString(not_plain, error.what());
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  } catch (const std::length_error& error) {
    PyErr_SetString(PyExc_EOFError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_SystemError, "an unknown C++ exception");
  }
}

// Calls a function that Python has called; `failed` is returned if it throws.
template <typename Function>
auto guarded(Function function, std::invoke_result_t<Function> failed = {}) {
  try {
    return function();
  } catch (...) {
    set_error();
    return failed;
  }
}

// Calls a function while other threads of Python may run.
template <typename Function>
auto without_gil(Function function) {
  struct Released {
    PyThreadState* state = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(state); }
  } released;
  return function();
}

// A reference that this object owns.
struct Dropped {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Dropped>;

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw ErrorIsSet();
  return object;
}

inline PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// The functions that return new references to Python's values of C++ ones.
inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(std::signed_integral auto value) {
  return checked(PyLong_FromLongLong(value));
}
inline PyObject* to_python(std::unsigned_integral auto value) {
  return checked(PyLong_FromUnsignedLongLong(value));
}
inline PyObject* to_python(const std::string& text) {
  const auto bytes = static_cast<Py_ssize_t>(text.size());
  return checked(PyUnicode_DecodeUTF8(text.data(), bytes, nullptr));
}

// Returns a list of what `convert` returns for each value.
template <typename Value, typename Convert>
PyObject* list_of(std::vector<Value> values, Convert convert) {
  Owned list(checked(PyList_New(0)));
  for (auto& value : values) {
    const Owned item(convert(std::move(value)));
    if (PyList_Append(list.get(), item.get()) != 0) throw ErrorIsSet();
  }
  return list.release();
}

template <typename Value>
PyObject* to_python(std::vector<Value> values) {
  return list_of(std::move(values), [](Value value) { return to_python(value); });
}

// A Python object that holds a C++ value, and the type of such objects.
template <typename Value>
struct Object {
  PyObject_HEAD Value value;
};
template <typename Value>
inline PyTypeObject* type_of = nullptr;

template <typename Value>
Value& value_of(PyObject* object) {
  return reinterpret_cast<Object<Value>*>(object)->value;
}

template <typename Value>
Value& checked_value_of(PyObject* object) {
  if (!PyObject_TypeCheck(object, type_of<Value>)) {
    PyErr_SetString(PyExc_TypeError, "an object of another type of realign_fast._io was expected");
    throw ErrorIsSet();
  }
  return value_of<Value>(object);
}

// Returns a new object that holds the value that `make` returns.
template <typename Value, typename Make>
PyObject* new_object(Make make) {
  PyObject* object = checked(PyType_GenericAlloc(type_of<Value>, 0));
  try {
    new (&value_of<Value>(object)) Value(make());
  } catch (...) {
    PyObject_Free(object);
    Py_DECREF(reinterpret_cast<PyObject*>(type_of<Value>));  // the object held a reference
    throw;
  }
  return object;
}

template <typename Value>
PyObject* wrap(Value value) {
  return new_object<Value>([&]() -> Value&& { return std::move(value); });
}

template <typename Value>
void delete_object(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  std::destroy_at(&value_of<Value>(object));
  PyObject_Free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

// Reads the arguments of a call by the format of PyArg_ParseTupleAndKeywords.
template <typename... Targets>
void parse(PyObject* args, PyObject* keywords, const char* format, std::vector<const char*> names,
           Targets*... targets) {
  names.push_back(nullptr);
  char** list = const_cast<char**>(names.data());
  if (!PyArg_ParseTupleAndKeywords(args, keywords, format, list, targets...)) throw ErrorIsSet();
}

// A member of a value, or a function of it, as a property of Python.
template <typename Value, auto get>
PyGetSetDef property(const char* name, const char* doc = nullptr) {
  const getter function = [](PyObject* self, void*) {
    return guarded([&] { return to_python(std::invoke(get, value_of<Value>(self))); });
  };
  return {name, function, nullptr, doc, nullptr};
}

// A function of a value and the arguments of a call, as a method of Python; `Value` is void for a
// function of the module.
template <typename Value, auto call>
PyMethodDef method(const char* name, const char* doc) {
  const PyCFunctionWithKeywords function = [](PyObject* self, PyObject* args, PyObject* keywords) {
    return guarded([&] {
      if constexpr (std::is_void_v<Value>) {
        return call(args, keywords);
      } else {
        return call(value_of<Value>(self), args, keywords);
      }
    });
  };
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_VARARGS | METH_KEYWORDS, doc};
}

// A function of a value without arguments, as the slot of a type.
template <typename Value, auto call>
PyType_Slot slot(int number) {
  const reprfunc function = [](PyObject* self) {
    return guarded([&] { return call(value_of<Value>(self)); });
  };
  return {number, reinterpret_cast<void*>(function)};
}

// A function of the arguments that returns a new object, as the constructor of a type.
template <auto call>
PyType_Slot constructor() {
  const newfunc function = [](PyTypeObject*, PyObject* args, PyObject* keywords) {
    return guarded([&] { return call(args, keywords); });
  };
  return {Py_tp_new, reinterpret_cast<void*>(function)};
}

// Adds the type of objects that hold a `Value` to the module. Python cannot create objects of a
// type without constructor. The arrays live as long as the type.
template <typename Value>
void add_type(PyObject* module, const char* name, const char* doc, std::vector<PyType_Slot> slots,
              std::vector<PyGetSetDef> properties = {}, std::vector<PyMethodDef> methods = {}) {
  bool can_be_created = false;
  for (const auto& slot : slots) can_be_created |= slot.slot == Py_tp_new;
  properties.push_back({});
  methods.push_back({});
  static std::vector<PyGetSetDef> kept_properties;
  static std::vector<PyMethodDef> kept_methods;
  kept_properties = std::move(properties);
  kept_methods = std::move(methods);
  slots.push_back({Py_tp_doc, const_cast<char*>(doc)});
  slots.push_back({Py_tp_dealloc, reinterpret_cast<void*>(&delete_object<Value>)});
  slots.push_back({Py_tp_getset, kept_properties.data()});
  slots.push_back({Py_tp_methods, kept_methods.data()});
  slots.push_back({});
  unsigned flags = Py_TPFLAGS_DEFAULT;
  if (!can_be_created) flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION;
  static std::string full_name;
  full_name = std::string("realign_fast._io.") + name;
  PyType_Spec spec = {full_name.c_str(), sizeof(Object<Value>), 0, flags, slots.data()};
  PyObject* type = checked(PyType_FromSpec(&spec));
  type_of<Value> = reinterpret_cast<PyTypeObject*>(type);
  Py_INCREF(type);
  if (PyModule_AddObject(module, name, type) != 0) throw ErrorIsSet();
}

// The contiguous buffer of a Python object, writable unless `flags` say otherwise. While this
// object lives, no other thread may resize it.
class BufferView {
 public:
  explicit BufferView(PyObject* object, int flags = PyBUF_CONTIG) {
    if (PyObject_GetBuffer(object, &view_, flags) != 0) throw ErrorIsSet();
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
  int64_t bytes() const { return view_.len; }

 private:
  Py_buffer view_;
};

}  // namespace realign_fast::io::python
