# Plain comments into Doxygen's: before a declaration, or behind one on its line. Rulers between
# sections are left alone, so that they do not stick to what follows them.
/^ *(\/\/|\/\*) ----/ b
s|^((typedef )?struct [a-z_]+ \{) +/\* (.*) \*/ *$|/** \3 */ \1|
s|^( *)// |\1/// |
s|^( *)//$|\1///|
s|^( *)/\* |\1/** |
s|^(.*[^ /*].*[;,{)0-9A-Za-z_]) +// (.*)$|\1 ///< \2|
s|^(.*[^ /*].*[;,{)0-9A-Za-z_]) +/\* (.*)$|\1 /**< \2|
s|^( *)uint64_t struct_size;$|\1uint64_t struct_size; /**< sizeof of the struct as its maker was compiled */|
